//! Certificates of one run: an authority, and a server certificate for `localhost` signed by
//! it.
//!
//! The authority is given in PEM, which the server is told to trust through `SSL_CERT_FILE`;
//! nothing is kept, and nothing else on this machine trusts it. The tests also make
//! certificates that must be refused.

use std::io;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// The authority in PEM, which the bridge shall trust, and what shows the certificate.
type Signed = (String, Arc<ServerConfig>);

/// A certificate authority and a server certificate for `localhost`, made for this one run.
pub(super) fn make_certificate() -> io::Result<Signed> {
    sign("callbridge's pretend world", &["localhost", "127.0.0.1"], |_| {})
}

fn sign(
    authority_name: &str,
    names: &[&str],
    change: impl FnOnce(&mut CertificateParams),
) -> io::Result<Signed> {
    let mut authority = CertificateParams::new(Vec::new()).map_err(io::Error::other)?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name.push(DnType::CommonName, authority_name);
    let authority_key = KeyPair::generate().map_err(io::Error::other)?;
    let authority =
        CertifiedIssuer::self_signed(authority, authority_key).map_err(io::Error::other)?;
    let names: Vec<String> = names.iter().copied().map(str::to_owned).collect();
    let mut server = CertificateParams::new(names).map_err(io::Error::other)?;
    change(&mut server);
    let server_key = KeyPair::generate().map_err(io::Error::other)?;
    let certificate = server.signed_by(&server_key, &authority).map_err(io::Error::other)?;

    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
    let chain = vec![certificate.der().clone()];
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(io::Error::other)?;
    Ok((authority.pem(), Arc::new(config)))
}

/// The certificate that a [`Front`](crate::demo::Front) shows.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Certificate {
    Good,
    Expired,
    WrongName,
    /// Signed by nobody whom the bridge is told to trust.
    Strange,
}

#[cfg(test)]
impl Certificate {
    pub(super) fn make(self) -> io::Result<Signed> {
        let world = "callbridge's pretend world";
        match self {
            Certificate::Good => make_certificate(),
            Certificate::Expired => sign(world, &["localhost", "127.0.0.1"], |server| {
                server.not_before = rcgen::date_time_ymd(2020, 1, 1);
                server.not_after = rcgen::date_time_ymd(2020, 3, 31);
            }),
            Certificate::WrongName => sign(world, &["other.example"], |_| {}),
            Certificate::Strange => {
                let (_, tls) = sign("somebody else's pretend world", &["localhost"], |_| {})?;
                // The authority of another run.
                Ok((make_certificate()?.0, tls))
            }
        }
    }
}
