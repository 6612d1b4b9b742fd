"""Names of columns that any file of cells can hold."""


def column_names(texts: list[str]) -> list[str]:
    """Texts as names of columns that HDF5 can hold: without slashes, none twice, none that is reserved."""
    names: list[str] = []
    for text in texts:
        name = text.replace("/", "|")
        while name in names or name in ("_index", ".", ".."):
            name += "_"
        names.append(name)
    return names
