"""Sharded tensors: shards, reductions over ranks, and FSDP2."""
