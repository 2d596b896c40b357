"""`mq-ao bench`: float and quantized programs, and peers, side by side in one run."""
