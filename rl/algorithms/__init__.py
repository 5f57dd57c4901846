"""One file per algorithm; TRL is imported here and nowhere else."""

ALGORITHMS = ("sft", "grpo", "dpo", "kto")
