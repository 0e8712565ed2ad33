"""Who may speak with whom: identities in certificates, the files they come from, TLS on sockets. Must not import grpc."""
