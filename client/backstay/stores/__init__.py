"""Snapshots of tools that bring their own state: DCP, files of ``backstay://``. No Snapshotter takes part."""
