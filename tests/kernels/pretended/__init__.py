"""What is to happen on a card, on one that is not there: see card.py."""
