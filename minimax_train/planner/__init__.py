"""Will a plan fit its machines: memory by arithmetic, and layouts that are refused, with the reason. Nothing is allocated."""
