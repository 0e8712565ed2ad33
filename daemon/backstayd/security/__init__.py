"""Who may talk to whom: identities in certificates, the certificate files, TLS on sockets. Must not import grpc."""
