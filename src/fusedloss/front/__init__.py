"""What makes a function and a module of a loss's definition: signature, checks, errors."""
