"""Maps as pictures: `overlay` on frames, contact sheets (`figure`) and files (`video`); needs the `viz` extra."""
