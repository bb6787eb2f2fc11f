"""`python -m spacompiler`, which is also how torchrun and accelerate start it."""

from .cli.main import main

if __name__ == "__main__":
    main()
