"""CDCDA-mobile, the device half: a PEFT adapter and a base model in, a verified phone artifact out."""
