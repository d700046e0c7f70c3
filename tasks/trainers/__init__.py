"""Who learns: one file a way of learning, one small protocol."""
