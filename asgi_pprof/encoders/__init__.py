"""Encode profiles as protobuf and as text. Encoders import the profile model and no collector."""
