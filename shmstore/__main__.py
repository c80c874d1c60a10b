"""`python -m shmstore`."""

from shmstore.cli import main

if __name__ == "__main__":  # multiprocess's spawned children import this module as another name
    main()
