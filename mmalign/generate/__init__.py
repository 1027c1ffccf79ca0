"""Text from models: one protocol, several backends."""
