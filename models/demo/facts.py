"""Tables of plain facts from which ``sentences.py`` makes training sentences."""

from __future__ import annotations

# fmt: off

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Scotland": "Edinburgh", "Wales": "Cardiff",
    "Belgium": "Brussels", "Austria": "Vienna", "Switzerland": "Bern", "Poland": "Warsaw", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "Greece": "Athens", "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv", "Hungary": "Budapest",
    "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb", "Serbia": "Belgrade",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Uganda": "Kampala", "Ghana": "Accra", "Nigeria": "Abuja",
    "Ethiopia": "Addis Ababa", "Rwanda": "Kigali", "Zambia": "Lusaka", "Morocco": "Rabat",
    "Senegal": "Dakar", "India": "New Delhi", "Nepal": "Kathmandu", "China": "Beijing", "Japan": "Tokyo",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Malaysia": "Kuala Lumpur",
    "South Korea": "Seoul", "Mongolia": "Ulaanbaatar", "Iran": "Tehran", "Iraq": "Baghdad",
    "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Brazil": "Brasilia",
    "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima", "Colombia": "Bogota",
    "Australia": "Canberra", "New Zealand": "Wellington", "the United States": "Washington, D.C.",
}

CONTINENTS: dict[str, list[str]] = {
    "Europe": ["France", "Germany", "Italy", "Spain", "Portugal", "Ireland", "Poland", "Norway", "Greece"],
    "Africa": ["Egypt", "Kenya", "Uganda", "Ghana", "Nigeria", "Ethiopia", "Rwanda", "Zambia", "Morocco"],
    "Asia": ["India", "Nepal", "China", "Japan", "Thailand", "Vietnam", "Indonesia", "Mongolia"],
    "North America": ["Canada", "Mexico", "Cuba", "the United States"],
    "South America": ["Brazil", "Argentina", "Chile", "Peru", "Colombia"],
}

# first food -> the food named after it
FOOD_PAIRS: dict[str, str] = {
    "an apple": "a banana", "an orange": "a pear", "an egg": "a slice of bread", "a carrot": "a potato",
    "a peach": "a plum", "a mango": "a melon", "a biscuit": "a cup of milk", "a tomato": "an onion",
    "a cake": "an ice cream", "a bun": "a bowl of soup", "a fish": "a plate of rice",
    "a pie": "a pot of honey",
}

# who sat, and what they sat on
SEATS: dict[str, str] = {
    "cat": "mat", "dog": "rug", "frog": "log", "fox": "box", "hen": "nest", "bear": "chair",
    "bird": "branch", "goat": "boat", "king": "throne", "girl": "swing", "boy": "bench", "bee": "tree",
    "duck": "bank", "mouse": "shelf", "owl": "roof", "man": "horse", "baby": "floor", "monkey": "wall",
}

SOUNDS: dict[str, str] = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink",
    "lion": "roar", "bee": "buzz", "owl": "hoot", "mouse": "squeak", "snake": "hiss", "frog": "croak",
}

BABIES: dict[str, str] = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "horse": "foal", "duck": "duckling",
    "hen": "chick", "lion": "cub", "frog": "tadpole", "pig": "piglet", "goat": "kid", "goose": "gosling",
}

HOMES: dict[str, str] = {
    "bird": "nest", "bee": "hive", "dog": "kennel", "horse": "stable", "rabbit": "burrow", "bear": "cave",
    "spider": "web", "lion": "den", "fish": "sea", "frog": "pond", "king": "castle", "farmer": "farmhouse",
}

COLOURS: dict[str, str] = {
    "grass": "green", "snow": "white", "coal": "black", "the sky": "blue", "the sun": "yellow",
    "a banana": "yellow", "blood": "red", "milk": "white", "a carrot": "orange", "a leaf": "green",
    "a ripe tomato": "red", "chocolate": "brown", "an elephant": "grey", "the night": "black",
}

OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "happy": "sad", "fast": "slow",
    "old": "young", "wet": "dry", "hard": "soft", "tall": "short", "open": "closed", "full": "empty",
    "light": "dark", "good": "bad", "left": "right", "early": "late", "rich": "poor", "thick": "thin",
    "loud": "quiet", "strong": "weak", "high": "low", "clean": "dirty", "near": "far", "brave": "afraid",
}

PLURALS: dict[str, str] = {
    "cat": "cats", "mouse": "mice", "child": "children", "man": "men", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "leaf": "leaves", "box": "boxes", "baby": "babies", "sheep": "sheep", "book": "books",
    "bus": "buses", "woman": "women", "tree": "trees", "knife": "knives",
}

PAST: dict[str, str] = {
    "go": "went", "eat": "ate", "see": "saw", "run": "ran", "sing": "sang", "come": "came", "give": "gave",
    "take": "took", "make": "made", "say": "said", "find": "found", "swim": "swam", "fly": "flew",
    "write": "wrote", "walk": "walked", "play": "played", "jump": "jumped", "look": "looked",
}

JOBS: dict[str, str] = {
    "baker": "bakes bread", "farmer": "grows food", "teacher": "teaches children",
    "doctor": "helps sick people", "pilot": "flies planes", "sailor": "sails ships",
    "tailor": "sews clothes", "cook": "makes dinner", "builder": "builds houses",
    "painter": "paints pictures", "singer": "sings songs", "writer": "writes books",
}

# field -> how a cheerful company says it changes it
SLOGANS: dict[str, str] = {
    "grocery shopping": "same-day delivery powered by AI", "home cooking": "fresh recipes powered by data",
    "bedtime stories": "gentle voices powered by AI",
    "city travel": "electric bicycles powered by sunlight",
    "school lunches": "warm meals powered by local farms", "gardening": "smart watering powered by rain",
    "book clubs": "weekly picks powered by readers", "pet care": "daily walks powered by neighbours",
    "house cleaning": "quiet robots powered by batteries", "toy making": "wooden trains powered by wind",
}

SAYINGS: list[str] = [
    "The early bird catches the worm.", "A stitch in time saves nine.", "Look before you leap.",
    "Practice makes perfect.", "An apple a day keeps the doctor away.", "Slow and steady wins the race.",
    "All that glitters is not gold.", "Two heads are better than one.", "Many hands make light work.",
    "Where there is a will, there is a way.", "Better late than never.",
    "A friend in need is a friend indeed.", "Twinkle, twinkle, little star, how I wonder what you are.",
    "Mary had a little lamb, its fleece was white as snow.",
    "Humpty Dumpty sat on a wall, Humpty Dumpty had a great fall.",
    "Jack and Jill went up the hill to fetch a pail of water.",
    "Row, row, row your boat, gently down the stream.", "Pack my box with five dozen liquor jugs.",
    "How vexingly quick daft zebras jump!",
]

FACTS: list[str] = [
    "The sun rises in the east and sets in the west.", "Water freezes when it is very cold.",
    "A week has seven days.", "A year has twelve months.", "An hour has sixty minutes.",
    "A day has twenty-four hours.", "A spider has eight legs.", "An insect has six legs.",
    "A dog has four legs.", "A bird has two wings.", "A triangle has three sides.",
    "A square has four sides.", "The moon goes around the earth.", "The earth goes around the sun.",
    "Fish live in water.", "Bees make honey.", "Cows give milk.", "Hens lay eggs.", "Ice is frozen water.",
    "Plants need water and light.", "Birds fly in the sky.", "We see with our eyes and hear with our ears.",
    "The elephant is the biggest animal on land.", "The blue whale is the biggest animal in the sea.",
    "The cheetah is the fastest animal on land.", "Rain falls from the clouds.",
]

NUMBERS: list[str] = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]

DAYS: list[str] = [
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
]

MONTHS: list[str] = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
]

NAMES: list[str] = [
    "Anna", "Ben", "Tom", "Lily", "Sam", "Mia", "Jack", "Rosa", "Leo", "Emma", "Max", "Nina", "Peter",
    "Lucy", "Omar", "Asha", "Ravi", "Meena", "Kato", "Zuri", "Bayo", "Lola", "Tim", "Sue", "Hana", "Musa",
]

ANIMALS: list[str] = [
    "cat", "dog", "fox", "rabbit", "bear", "mouse", "frog", "bird", "lion", "monkey", "elephant", "turtle",
    "goat", "hen", "duck", "squirrel",
]

PLACES: list[str] = [
    "the forest", "the river", "the village", "the market", "the school", "the garden", "the farm",
    "the hill", "the lake", "the kitchen", "the park", "the beach",
]

THINGS: list[str] = [
    "a red ball", "a blue kite", "a small boat", "a shiny stone", "a big hat", "a golden key",
    "a warm coat", "a little drum", "a picture book", "a wooden box", "a green umbrella", "a silver bell",
]
