//! Blocking HTTP to the three parties, and the certificates it trusts.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};

/// A connection that was idle for longer is not used again.
pub(crate) const IDLE_MAX: Duration = Duration::from_secs(30);
/// What a request to Ultravox, n8n or Twilio takes for a buffer each way. ureq would take 128 KiB,
/// and an allocator does not give them back after a busy minute.
pub(crate) const HTTP_BUFFER_BYTES: usize = 16 * 1_024;

/// Mozilla's roots, and those of the owner's own file.
pub(crate) fn trusted_roots(extra: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut roots: Vec<CertificateDer> = webpki_root_certs::TLS_SERVER_ROOT_CERTS.to_vec();
    if let Some(path) = extra {
        let complain = |why: String| format!("SSL_CERT_FILE  {}: {why}", path.display());
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| complain(error.to_string()))?;
        let before = roots.len();
        for certificate in certificates {
            roots.push(certificate.map_err(|error| complain(error.to_string()))?);
        }
        if roots.len() == before {
            return Err(complain("has no certificate in it (it must be PEM)".into()));
        }
    }
    Ok(roots)
}

pub(crate) fn tls_config(roots: &[CertificateDer<'static>]) -> Arc<ClientConfig> {
    // ureq looks for the process's default as well; `outbox --retry` may have set it already.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        // There is one, and there is no other one in this program.
    }
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots.iter().cloned());
    Arc::new(ClientConfig::builder().with_root_certificates(store).with_no_client_auth())
}

/// Blocking HTTP: every status is an answer, redirects are not followed, no proxy is guessed.
pub(crate) fn http_agent(roots: &[CertificateDer<'static>]) -> ureq::Agent {
    let roots: Vec<ureq::tls::Certificate> =
        roots.iter().map(|root| ureq::tls::Certificate::from_der(root).to_owned()).collect();
    let tls = ureq::tls::TlsConfig::builder()
        .root_certs(ureq::tls::RootCerts::Specific(Arc::new(roots)))
        .build();
    ureq::Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .user_agent(concat!("callbridge/", env!("CARGO_PKG_VERSION")))
        // A connection that the other side has closed meanwhile is noticed and left alone.
        .max_idle_age(IDLE_MAX)
        .input_buffer_size(HTTP_BUFFER_BYTES)
        .output_buffer_size(HTTP_BUFFER_BYTES)
        .build()
        .into()
}

#[cfg(test)]
mod tests;
