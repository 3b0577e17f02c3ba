"""What stands in the sections of the page: texts and tables; pictures have a package of their own."""
