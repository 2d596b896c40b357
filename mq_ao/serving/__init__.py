"""A server that speaks OpenAI's protocol: requests are decoded as one batch, and shared prompts are read once."""
