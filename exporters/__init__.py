"""One file per export format; `kind_edge.registry` loads them by name, on demand."""

if __name__ != "kind_edge.exporters":
    # The folder lies at the top of the repository, so a plain `import exporters` would load a second copy beside the
    # installed one, and classes of the two would not be equal.
    raise ImportError(f"this package is kind_edge.exporters, not {__name__!r}: import kind_edge.exporters instead")
