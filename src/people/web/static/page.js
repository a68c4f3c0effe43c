// The page: who is in, the list of all guests, and the desk with the consoles that are open.

import "./strict.js";
import { draw } from "./glance.js";
import { Pane, bytes } from "./pane.js";
import * as colours from "./colours.js";
import { play } from "./player.js";

const $ = (id) => document.getElementById(id);
const guests = new Map(); // by id: what the server told, its card and its last screen
let order = [];
let list = null;
let patience = 250;
let choosing = false;
let sticky = false;
let failing = "";

// Who is in

async function post(path, body) {
  const request = { method: "POST", body: JSON.stringify(body ?? {}) };
  const answer = await fetch(path, request).catch(() => null);
  const said = await answer?.json().catch(() => null);
  return { ok: Boolean(answer?.ok), error: "The server does not answer.", ...said };
}

async function enter(said) {
  const answer = await post("login", said);
  $("refused").textContent = answer.ok ? "" : answer.error;
  if (answer.ok) {
    await begin();
  }
  return answer.ok;
}

async function begin() {
  let session;
  try {
    session = await (await fetch("session")).json();
  } catch {
    notice("The page's server does not answer. Trying again.");
    setTimeout(begin, (patience = Math.min(patience * 2, 5000)));
    return;
  }
  $("login").hidden = session.inside;
  $("main").hidden = !session.inside;
  $("logout").hidden = !session.inside || !session.login;
  if (session.inside) {
    watch();
    route();
  } else {
    panes.slice().forEach((pane) => pane.close());
    panes.length = 0;
    notice("");
    $("summary").textContent = "";
    const named = session.login === "password";
    const user = $("user");
    user.hidden = user.labels[0].hidden = user.disabled = !named;
    $("secret").labels[0].textContent = named ? "Password" : "Token, as the server printed it";
    (named ? user : $("secret")).focus();
  }
}

$("login").onsubmit = (event) => {
  event.preventDefault();
  const secret = $("secret").value;
  $("secret").value = "";
  enter($("user").disabled ? { token: secret } : { user: $("user").value, password: secret });
};
$("logout").onclick = async () => {
  const { ok, error } = await post("logout");
  if (!ok) {
    notice(error);
    return;
  }
  location.hash = "";
  location.reload();
};

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// The list

function watch() {
  if (list) {
    return;
  }
  list = new WebSocket(new URL("guests", location.href.replace(/^http/, "ws")));
  list.onopen = () => {
    patience = 250;
    notice("");
    look();
  };
  list.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.type === "guests") {
      take(message);
    } else if (message.type === "screen") {
      const guest = guests.get(message.id);
      if (guest) {
        guest.screen = message;
        show(guest);
      }
    }
  };
  list.onclose = () => {
    list = null;
    notice("The page's server does not answer. Trying again.");
    setTimeout(begin, patience);
    patience = Math.min(patience * 2, 5000);
  };
}

const visible = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    visible[entry.isIntersecting ? "add" : "delete"](entry.target.dataset.id);
  }
  look();
});

// Tells the server which screens are seen.
function look() {
  if (list?.readyState === WebSocket.OPEN) {
    const at = document.hidden || $("overview").hidden ? [] : [...visible];
    list.send(JSON.stringify({ type: "look", at }));
  }
}
document.addEventListener("visibilitychange", look);

function take({ order: now, changed, failures }) {
  order = now;
  for (const told of changed) {
    const known = guests.get(told.id);
    guests.set(told.id, { card: known?.card ?? card(told), screen: known?.screen, ...told });
  }
  for (const [id, guest] of guests) {
    if (!now.includes(id)) {
      observer.unobserve(guest.card);
      visible.delete(id);
      guest.card.remove();
      guests.delete(id);
    }
  }
  changed.forEach((told) => fill(guests.get(told.id)));
  now.forEach((id, index) => {
    const { card: element } = guests.get(id);
    if ($("guests").children[index] !== element) {
      $("guests").insertBefore(element, $("guests").children[index] ?? null);
      observer.observe(element);
    }
  });
  for (const pane of panes) {
    const port = guests.get(pane.guest)?.ports.find(({ id }) => id === pane.port);
    if (port) {
      pane.sized(port);
    }
  }
  $("none").hidden = now.length > 0;
  const running = now.filter((id) => guests.get(id).connected).length;
  $("summary").textContent = now.length
    ? `${now.length} ${now.length === 1 ? "guest" : "guests"}, ${running} connected`
    : "";
  if (failures.join("\n") !== failing) {
    notice((failing = failures.join("\n")));
  }
}

const open = (event, guest, port) => {
  const beside = choosing || event.ctrlKey || event.metaKey || event.shiftKey;
  go([...(beside ? wanted() : []), { guest, port }]);
};

function card(told) {
  const element = $("card").content.cloneNode(true).firstElementChild;
  element.dataset.id = told.id;
  element.querySelector(".name").textContent = told.name;
  return element;
}

function fill(guest) {
  const { card: element, ports } = guest;
  const first = ports.find((port) => port.console) ?? ports[0];
  const state = guest.state === "running" ? (guest.connected ? "connected" : "no guest yet") : guest.state;
  element.dataset.state = guest.state === "running" && guest.connected ? "live" : "lost";
  element.querySelector(".state").textContent = state;
  const rate = (what) => ports.reduce((sum, port) => sum + port[what], 0);
  const readers = ports.reduce((sum, port) => sum + port.readers, 0);
  const [out, into] = [rate("out_rate"), rate("in_rate")];
  const facts = [
    ...(out ? [`out ${bytes(out)}/s`] : []),
    ...(into ? [`in ${bytes(into)}/s`] : []),
    ...(out || into ? [] : ["quiet"]),
    `${bytes(rate("output"))} so far`,
    ...(readers ? [`${readers} ${readers === 1 ? "reader" : "readers"}`] : []),
  ];
  if (guest.restarts) {
    facts.push(`${guest.restarts} ${guest.restarts === 1 ? "restart" : "restarts"}`);
  }
  element.querySelector(".facts").textContent = facts.join(" \u00b7 ");
  element.querySelector(".facts").title = guest.died ?? "";
  const button = element.querySelector(".open");
  button.setAttribute("aria-label", `${guest.name}, ${state}, ${facts.join(", ")}`);
  button.disabled = !first;
  button.onclick = (event) => open(event, guest.id, first.id);
  const others = ports.filter((port) => port !== first);
  const names = others.map((port) => `${port.id} ${port.name}`).join("\n");
  const place = element.querySelector(".ports");
  if (place.dataset.names !== names) {
    place.dataset.names = names;
    place.replaceChildren(
      ...others.map((port) => {
        const other = document.createElement("button");
        other.type = "button";
        other.textContent = port.name || `port ${port.id}`;
        other.onclick = (event) => open(event, guest.id, port.id);
        return other;
      }),
    );
  }
}

function show(guest) {
  if (!guest.screen) {
    return;
  }
  const { data, columns, rows } = guest.screen;
  const text = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  draw(guest.card.querySelector("canvas"), text, columns, rows);
}

// The desk: which consoles are open stands in the address.

const panes = [];
let current = null;

function wanted() {
  try {
    return location.hash
      .slice(1)
      .split("&")
      .map((part) => part.split(":"))
      .filter((part) => part.length === 2)
      .map(([guest, port]) => ({ guest: decodeURIComponent(guest), port: Number(port) }));
  } catch {
    return []; // a % that stands for nothing
  }
}

const same = (a, b) => a.guest === b.guest && a.port === b.port;

function go(places) {
  const once = places.filter((place, index) => places.findIndex((p) => same(p, place)) === index);
  const hash = once.map(({ guest, port }) => `${encodeURIComponent(guest)}:${port}`).join("&");
  const last = places.at(-1);
  choosing = false;
  if (location.hash.slice(1) === hash) {
    route();
  } else {
    location.hash = hash;
  }
  current = panes.find((pane) => last && same(pane, last)) ?? current;
}

const desk = {
  isGuests: (event) => !shortcut(event, false),
  lost: () => fetch("session").then((a) => a.json()).then((s) => s.inside || begin(), () => {}),
  control: (held) => holdControl(held, false),
  close: (pane) => go(wanted().filter((place) => !same(place, pane))),
  choose() {
    choosing = true;
    route();
  },
};

function route() {
  if ($("main").hidden) {
    return;
  }
  const places = wanted();
  for (const pane of panes.slice()) {
    if (!places.some((place) => same(place, pane))) {
      panes.splice(panes.indexOf(pane), 1);
      pane.close();
    }
  }
  const isDesk = places.length > 0 && !choosing;
  $("overview").hidden = isDesk;
  $("desk").hidden = !isDesk;
  document.body.classList.toggle("desk", isDesk);
  $("overview").classList.toggle("choosing", choosing);
  for (const place of places) {
    let pane = panes.find((each) => same(each, place));
    if (!pane) {
      const [name] = place.guest.split("\n");
      const label = place.port ? `${name}, port ${place.port}` : name;
      pane = new Pane($("pane"), { ...place, label }, desk);
      pane.element.addEventListener("focusin", () => {
        current = pane;
        panes.forEach((each) => each.element.classList.toggle("current", each === pane));
      });
      panes.push(pane);
      $("panes").append(pane.element);
      pane.open();
      current = pane;
    }
  }
  $("panes").dataset.count = panes.length;
  document.title = isDesk ? `${panes.map((pane) => pane.label).join(" | ")} - Consoles` : "Consoles";
  if (isDesk) {
    (panes.includes(current) ? current : panes[0]).focus();
  } else {
    order.forEach((id) => show(guests.get(id)));
    ($("guests").querySelector(".open") ?? $("main")).focus({ preventScroll: true });
  }
  look();
}
addEventListener("hashchange", () => {
  choosing = false;
  route();
});
$("home").onclick = (event) => {
  event.preventDefault();
  go([]);
};
$("skip").onclick = (event) => {
  event.preventDefault(); // it would be the address
  ($("desk").hidden ? $("main") : current).focus();
};

// Keys

const shortcuts = {
  o: () => go([]),
  n: () => step(1),
  p: () => step(-1),
  f: () => current?.showFind(true),
  t: () => current?.switchRole(),
  m: () => current?.showMenu(),
  x: () => current && desk.close(current),
  h: () => $("shortcuts").showModal(),
};

function step(by) {
  if (panes.length) {
    panes[(panes.indexOf(current) + by + panes.length) % panes.length].focus();
  }
}

// Returns what an event's keys mean to the page, if anything, and does it if `act`.
function shortcut(event, act) {
  const isOurs = event.ctrlKey && event.altKey && !event.getModifierState("AltGraph");
  const letter = /^Key([A-Z])$/.exec(event.code)?.[1].toLowerCase();
  const found = isOurs && event.type === "keydown" ? shortcuts[letter] : undefined;
  if (found && act) {
    event.preventDefault();
    found();
  }
  return found;
}
addEventListener("keydown", (event) => shortcut(event, !$("main").hidden));

const keys = [
  ["Esc", "\x1b"], ["Tab", "\t"], ["Ctrl", null], ["\u2190", "\x1b[D", "Left"],
  ["\u2193", "\x1b[B", "Down"], ["\u2191", "\x1b[A", "Up"], ["\u2192", "\x1b[C", "Right"],
  ["|", "|"], ["/", "/"], ["-", "-"], ["~", "~"], ["Home", "\x1b[H"], ["End", "\x1b[F"],
];
$("keys").append(
  ...keys.map(([label, text, name]) => {
    const key = document.createElement("button");
    key.type = "button";
    key.textContent = label;
    key.setAttribute("aria-label", name ?? label);
    key.onpointerdown = (event) => event.preventDefault(); // or the terminal, and its keyboard, go
    key.onclick = () => (text === null ? holdControl(!sticky, true) : current?.key(text));
    key.classList.toggle("control", text === null);
    return key;
  }),
);
$("keys").hidden = !matchMedia("(pointer: coarse)").matches;

function holdControl(held, tell) {
  sticky = held;
  $("keys").querySelector(".control").setAttribute("aria-pressed", String(held));
  if (tell) {
    current?.holdControl(held);
  }
}

// Recordings

async function playFile(file) {
  try {
    await play(file);
    notice("");
  } catch (error) {
    notice(`${file.name} cannot be played: ${error.message}.`);
  }
}
$("choose").onclick = () => $("file").click();
$("file").onchange = ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) {
    playFile(file);
  }
};
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file && !$("main").hidden) {
    playFile(file);
  }
});

// The rest

$("help").onclick = () => $("shortcuts").showModal();
$("shortcuts").addEventListener("close", () => current?.focus());
$("reader").checked = localStorage.getItem("reader") === "yes";
$("reader").onchange = ({ target }) => {
  localStorage.setItem("reader", target.checked ? "yes" : "no");
  panes.forEach((pane) => {
    pane.terminal.options.screenReaderMode = target.checked;
  });
};
$("theme").onclick = () => colours.toggle();
colours.onTheme(() => guests.forEach(show));
colours.remember();

const given = /^#token=([\w-]+)$/.exec(location.hash);
if (given) {
  history.replaceState(null, "", location.pathname); // out of the address and the history
  enter({ token: given[1] }).then((inside) => inside || begin());
} else {
  begin();
}
