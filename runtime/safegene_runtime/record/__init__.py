"""What was asked and answered once: prompts, jailbreaks, and the recorded reference."""
