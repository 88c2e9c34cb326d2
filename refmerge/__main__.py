from refmerge.cli import main

main()
