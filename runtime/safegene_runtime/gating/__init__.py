"""From counts to a verdict: statistics, profiles, bounds, and the gate."""
