"""What a run said, to be looked at: completions while it trained, and held-out answers before and after."""
