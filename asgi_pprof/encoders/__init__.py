"""Profiles as bytes and text. Encoders read the model and never see a collector."""
