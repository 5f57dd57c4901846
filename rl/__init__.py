"""Duet's training side: config -> model and data -> TRL trainer <-> MLX rollouts -> run record."""
