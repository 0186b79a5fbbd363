"""Labelled images: published sets, folders of files, in memory or decoded while they are used."""
