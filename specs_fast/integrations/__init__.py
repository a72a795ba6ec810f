"""The kernels inside other people's training code: one module per host, each imported only by who uses that host."""
