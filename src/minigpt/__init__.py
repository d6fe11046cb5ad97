"""minigpt: a language model's whole life, from raw text to a served, improving model."""
