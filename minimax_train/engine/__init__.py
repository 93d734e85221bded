"""The binding to megatron-core; every touch of one of its privates lives here."""
