"""The engine of phones: llama.cpp as static programs, in variants for what a phone's cores can do. The only code of ours is the recipe."""
