//! `GET /metrics`.

use std::fmt::Display;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::Bridge;
use crate::door::reply::Reply;
use crate::records::outbox::Outbox;
use crate::toolbox::log::{ERRORS, WARNINGS};
use crate::toolbox::metrics::{Counter, Family, Histogram};
use crate::toolbox::threads::lock;

/// `GET /metrics`.
pub(crate) fn metrics(bridge: &'static Bridge, _: &tiny_http::Request) -> Reply {
    let counted = &bridge.metrics;
    let mut page = MetricsPage(String::new());
    page.counters("Calls that have ended, by how they ended.", &counted.calls);
    let calls = bridge.calls.all().len();
    page.gauge("callbridge_calls_in_progress", "Lines in use.", calls);
    page.gauge("callbridge_calls_max", "The lines there are, MAX_CALLS.", bridge.config.max_calls);
    page.counters("Connections, requests and calls turned away.", &counted.refusals);
    page.histograms("From the ring to our answer.", &counted.answer_time);
    page.histograms("From the first stream to the agent's first sound.", &counted.dead_air);
    page.histograms("From reading a message with sound to its being sent.", &counted.relay_delay);
    page.counters("Messages with sound that reached nobody.", &counted.frames_dropped);
    page.counters("Lines that broke in a call.", &counted.broken_lines);
    page.counters("Calls that went on after a break.", &counted.resumes);
    page.counters("Tools that the agent has asked for.", &counted.tools);
    page.histograms("Time until the agent had a tool's result.", &counted.tool_time);
    page.counters("Requests to n8n.", &counted.n8n_requests);
    page.histograms("Time that n8n took.", &counted.n8n_time);
    page.counters("Requests to create an agent's call.", &counted.ultravox_creates);
    page.histograms("Time that creating an agent's call took.", &counted.ultravox_time);
    page.outbox(&bridge.outbox);
    page.head("callbridge_log_lines_total", "counter", "Warnings and errors, logged or not.");
    page.sample("callbridge_log_lines_total", &[("level", "warn")], WARNINGS.value());
    page.sample("callbridge_log_lines_total", &[("level", "error")], ERRORS.value());
    page.head("callbridge_build_info", "gauge", "The version that runs.");
    page.sample("callbridge_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    let began = bridge.began.as_millisecond();
    let seconds = format!("{}.{:03}", began / 1_000, began % 1_000);
    page.gauge("process_start_time_seconds", "When the process began, since 1970.", seconds);
    Reply::new(200, "text/plain; version=0.0.4; charset=utf-8", page.0)
}

pub(crate) struct MetricsPage(pub(crate) String);

impl MetricsPage {
    pub(crate) fn counters(&mut self, help: &str, family: &Family<Counter>) {
        self.head(family.name, "counter", help);
        for (values, counter) in &*lock(&family.series) {
            let labels: Vec<_> = labelled(family.labels, values).collect();
            self.sample(family.name, &labels, counter.value());
        }
    }

    pub(crate) fn histograms(&mut self, help: &str, family: &Family<Histogram>) {
        let name = family.name;
        self.head(name, "histogram", help);
        let (buckets, sum, count) =
            (format!("{name}_bucket"), format!("{name}_sum"), format!("{name}_count"));
        for (values, histogram) in &*lock(&family.series) {
            let labels: Vec<_> = labelled(family.labels, values).collect();
            let bounds = histogram.bounds_us.iter().map(|&us| seconds(Duration::from_micros(us)));
            let mut so_far = 0;
            for (bound, counter) in bounds.chain(["+Inf".into()]).zip(&histogram.counts) {
                so_far += counter.value();
                self.sample(&buckets, &[&labels[..], &[("le", &*bound)]].concat(), so_far);
            }
            let total = Duration::from_nanos(histogram.sum_ns.load(Ordering::Relaxed));
            self.sample(&sum, &labels, seconds(total));
            self.sample(&count, &labels, so_far);
        }
    }

    pub(crate) fn outbox(&mut self, outbox: &Outbox) {
        self.gauge(
            "callbridge_outbox_transcripts",
            "Transcripts that wait for n8n.",
            outbox.waiting(),
        );
        let oldest = seconds(outbox.oldest());
        self.gauge("callbridge_outbox_oldest_seconds", "Age of the oldest of them.", oldest);
        let help = "Transcripts that n8n has not taken in time, see callbridge outbox.";
        self.gauge("callbridge_outbox_given_up", help, outbox.given_up());
    }

    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    pub(crate) fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(&format!("# HELP {name} {help}"));
        self.line(&format!("# TYPE {name} {kind}"));
    }

    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let escape =
            |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value)));
        let labels = labels.collect::<Vec<_>>().join(",");
        let labels = if labels.is_empty() { labels } else { format!("{{{labels}}}") };
        self.line(&format!("{name}{labels} {value}"));
    }

    pub(crate) fn line(&mut self, text: &str) {
        self.0.push_str(text);
        self.0.push('\n');
    }
}

pub(crate) fn labelled<'a>(
    labels: &'a [&'a str],
    values: &'a [String],
) -> impl Iterator<Item = (&'a str, &'a str)> {
    labels.iter().copied().zip(values.iter().map(String::as_str))
}

pub(crate) fn seconds(time: Duration) -> String {
    time.as_secs_f64().to_string()
}

#[cfg(test)]
mod tests;
