"""`python -m papers new SLUG`: a study to start from, which runs as it is."""

from pathlib import Path

from papers.study import FILE, NAME
from rl import files
from rl.errors import UserError

PAPER = """# What is asked, why, and what is held equal: write it here.

title = "More of the same, or reinforcement"
question = "Does GRPO add to a policy what as many steps of SFT do not?"
seeds = [0, 1, 2, 3, 4]
set = ["run.device=cpu"]
metrics = ["reward"]

[quick] # --quick: numbers that mean nothing, in a minute
runs = ["grpo", "sft"]
seeds = [0, 1]
set = ["data.train_size=64", "eval.size=16", "trainer.max_steps=4", "trainer.save_steps=2"]

[[run]]
name = "start"
config = "configs/tiny/sft.toml"
seeds = [0]

[[run]]
name = "grpo"
label = "GRPO"
config = "configs/tiny/grpo.toml"
builds_on = { "model.from" = "start" }

[[run]]
name = "sft"
label = "SFT"
config = "configs/tiny/sft_more.toml"
set = ["trainer.max_steps=150"]
builds_on = { "model.from" = "start" }

[[claim]]
name = "grpo-adds"
say = "GRPO answers more questions right than the policy it starts from."
source = "Shao et al. 2024, DeepSeekMath, section 4"
test = "accuracy(grpo) - accuracy(start) > 0 at 95 %"

[[table]]
name = "scores"
caption = "Held-out questions right, and seconds of a run."
runs = ["start", "grpo", "sft"]
columns = { "right" = "accuracy(x)", "seconds" = "wall_s(x)" }

[[figure]]
name = "reward"
caption = "Reward along training: mean over seeds and its interval."
runs = ["grpo"]
x = "step"
y = ["reward"]
xlabel = "step"
ylabel = "reward"
"""
REPORT = """#import "../report.typ": *
#show: paper

= Question

Say what is asked and why. No number stands in this file: they come from the tables, the figures and the claims.

= What was found

#summary()

#claims()

#results("scores")

#drawing("reward")

= How it was decided

#method()

= Runs

#runs()
"""


def write(root: Path, slug: str) -> list[Path]:
    """The new study's files. UserError for a name that is none or is taken."""
    if not NAME.fullmatch(slug):
        raise UserError(f"new {slug}: valid: lower case, digits and single hyphens, e.g. larger-groups")
    folder = root / "papers" / slug
    if folder.exists():
        raise UserError(f"papers/{slug}: is there already; choose another name")
    for name, text in ((FILE, PAPER), ("report.typ", REPORT)):
        files.write_text(folder / name, text)
    return [folder / FILE, folder / "report.typ"]
