"""Ask bundles questions with known answers, and draw what an answer kept."""
