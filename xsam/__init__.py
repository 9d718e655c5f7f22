"""X-SAM in PyTorch. Start reading at model.py; README.md has the map."""
