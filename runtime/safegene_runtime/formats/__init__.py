"""Files as they come from outside: opened safely, read strictly, every byte accounted for."""
