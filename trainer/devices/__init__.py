"""Where a run runs: accelerators, devices, number formats, strategies of distribution."""
