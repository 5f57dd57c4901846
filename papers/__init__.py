"""Studies that anyone can re-run: `papers/<slug>/paper.toml` names runs and claims, this package makes and checks them.

- `study`: paper.toml, read and checked; `jobs`: the runs it asks for, each written out as one config.
- `runner`: makes what is missing, several at a time; `results`: what is kept of a run, committed with the study.

It reads run folders and starts training in child processes: nothing here imports torch, mlx or trl.
"""
