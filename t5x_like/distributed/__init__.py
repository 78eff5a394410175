"""Multi-process runs: cluster detection, startup, coordination and preemption."""
