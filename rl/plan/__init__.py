"""Will it fit, how long will it take: said from a config and a `config.json` alone, before anything is loaded.

`architecture` reads sizes, `workload` what a config asks for, `memory` and `time` predict, `verdict` looks for settings
that fit, `table` writes docs/memory.md. `measure` is the other side: it runs real steps and notes their peaks.
"""
