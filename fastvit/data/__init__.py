"""Images and labels from folders, archives, tables and data set libraries.

:func:`fastvit.data.datasets.open_data` opens a data set by its name; :func:`fastvit.data.images.open_images` opens the
images of one source, for it and for ``fastvit embed``.
"""
