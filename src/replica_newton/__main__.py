"""`python -m replica_newton`: the command."""

from replica_newton.cli import main

if __name__ == "__main__":
    main()
