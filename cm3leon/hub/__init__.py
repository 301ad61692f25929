"""Models for people who do not have this project: folders as Hugging Face's libraries read them, and their Hub."""
