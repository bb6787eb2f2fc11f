"""The built-in passes, one file a pass, installed as ``spacompiler.passes``.

The folder stands at the top of the repository and is mapped into the package, because a package
of the bare name ``passes`` would collide with a folder of yours by that name:

>>> import spacompiler.passes
>>> spacompiler.passes.__name__
'spacompiler.passes'
"""

if __name__ != "spacompiler.passes":
    raise ImportError(
        f"this folder is the package spacompiler.passes, but it was imported as {__name__!r}; "
        "write 'import spacompiler.passes', or run from outside the root of the repository "
        "if you meant a package of your own",
        name=__name__,
    )
