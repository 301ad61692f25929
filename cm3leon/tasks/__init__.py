"""What the model is asked: training documents become prompts, answers become segments."""
