"""Sharded tensors (DTensor): shards, reductions over ranks, and FSDP2."""
