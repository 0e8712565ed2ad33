"""The file format: manifest, shard file, digests, boxes of tensors, JSON records, versions. No I/O but the shard's."""
