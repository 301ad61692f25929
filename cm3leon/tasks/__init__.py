"""What is asked of the model: training documents to prompts, answers to segments."""
