"""Models for people without this project: folders that Hugging Face's libraries read, and the
Hub."""
