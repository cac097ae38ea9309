package suite

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Certs are two authorities, as in an installation (one for clients, one for
// agents), with a leaf for each end, and a third authority nobody trusts.
type Certs struct {
	FrontendCA, ClusterCA, ForeignCA authority
	Frontend, Client, Cluster, Agent pair
	ForeignClient, ForeignLeaf       pair
}

type authority struct {
	File string
	Pool *x509.CertPool
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

type pair struct {
	CertFile, KeyFile string
	TLS               tls.Certificate
}

// NewCerts writes a fresh set of certificates into dir.
func NewCerts(dir string) (*Certs, error) {
	c := &Certs{}
	for _, a := range []struct {
		to   *authority
		name string
	}{{&c.FrontendCA, "frontend-ca"}, {&c.ClusterCA, "cluster-ca"}, {&c.ForeignCA, "foreign-ca"}} {
		if err := a.to.create(dir, a.name); err != nil {
			return nil, err
		}
	}
	for _, l := range []struct {
		to    *pair
		ca    *authority
		name  string
		usage x509.ExtKeyUsage
	}{
		{&c.Frontend, &c.FrontendCA, "frontend", x509.ExtKeyUsageServerAuth},
		{&c.Client, &c.FrontendCA, "client", x509.ExtKeyUsageClientAuth},
		{&c.Cluster, &c.ClusterCA, "cluster", x509.ExtKeyUsageServerAuth},
		{&c.Agent, &c.ClusterCA, "agent", x509.ExtKeyUsageClientAuth},
		{&c.ForeignClient, &c.ForeignCA, "foreign-client", x509.ExtKeyUsageClientAuth},
		{&c.ForeignLeaf, &c.ForeignCA, "foreign-server", x509.ExtKeyUsageServerAuth},
	} {
		if err := l.to.create(dir, l.name, l.ca, l.usage); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err)
	}
	return n
}

func (a *authority) create(dir, name string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	a.key, a.File, a.Pool = key, filepath.Join(dir, name+".crt"), x509.NewCertPool()
	a.Pool.AddCert(a.cert)
	return writePEM(a.File, "CERTIFICATE", der)
}

func (p *pair) create(dir, name string, ca *authority, usage x509.ExtKeyUsage) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	p.CertFile, p.KeyFile = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	if err := writePEM(p.CertFile, "CERTIFICATE", der); err != nil {
		return err
	}
	if err := writePEM(p.KeyFile, "PRIVATE KEY", keyDER); err != nil {
		return err
	}
	p.TLS, err = tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
	return err
}

func writePEM(file, kind string, der []byte) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// clientTLS is the configuration of a client of the server's frontend, or with
// agent set of an agent.
func (c *Certs) clientTLS(agent bool) *tls.Config {
	ca, leaf := c.FrontendCA, c.Client
	if agent {
		ca, leaf = c.ClusterCA, c.Agent
	}
	return &tls.Config{RootCAs: ca.Pool, Certificates: []tls.Certificate{leaf.TLS}, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}
}
