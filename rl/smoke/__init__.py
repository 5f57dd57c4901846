"""What works on this machine's device, each number against a reference: `nox -s mps_smoke`."""
