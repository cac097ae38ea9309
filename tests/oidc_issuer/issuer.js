// An OpenID Connect issuer for tests: oidc-provider, whose accounts log in and consent by themselves.
//
// Usage: node issuer.js PORT KEY CERTIFICATE [HOST], the last one for its URL. It listens on 127.0.0.1.
// Each line on stdin is a command in JSON, and is answered by a line on stdout:
//   {"account": NAME, "claims": {...}, "lifetime": SECONDS}  who logs in as NAME gets these claims for so long
//   {"client": ID, "algorithm": "RS256"}                     who asks for tokens, and how those are signed
//   {"rotate": true, "keep": true}                           sign with new keys; the old ones stay published, or not
//   {"listen": false}                                        refuse connections, until it is true again
// Ends with its stdin.
import crypto from 'node:crypto';
import fs from 'node:fs';
import https from 'node:https';
import readline from 'node:readline';

import Provider from 'oidc-provider';

const [port, keyFile, certificateFile, host = '127.0.0.1'] = process.argv.slice(2);
const issuer = `https://${host}:${port}`;
const algorithms = ['RS256', 'PS256', 'ES256', 'ES384', 'EdDSA'];
const accounts = new Map();
const clients = new Map();
const stored = new Map();
let keys = newKeys();

function newKeys() {
  const made = [
    ['rsa', { modulusLength: 2048 }],
    ['ec', { namedCurve: 'P-256' }],
    ['ec', { namedCurve: 'P-384' }],
    ['ed25519', {}],
  ];
  return made.map(([type, options]) => ({
    ...crypto.generateKeyPairSync(type, options).privateKey.export({ format: 'jwk' }),
    kid: crypto.randomBytes(8).toString('hex'),
    use: 'sig',
  }));
}

/** What oidc-provider remembers; clients are what the commands say. */
class Memory {
  constructor(model) { this.model = model; }
  key(id) { return `${this.model}:${id}`; }
  async find(id) { return this.model === 'Client' ? clients.get(id) : stored.get(this.key(id)); }
  async findByUid(uid) { return [...stored.values()].find((value) => value.uid === uid); }
  async findByUserCode() { return undefined; }
  async upsert(id, payload) { stored.set(this.key(id), payload); }
  async consume(id) { stored.get(this.key(id)).consumed = true; }
  async destroy(id) { stored.delete(this.key(id)); }
  async revokeByGrantId(grant) {
    for (const [key, value] of stored) if (value.grantId === grant) stored.delete(key);
  }
}

function newHandler() {
  const provider = new Provider(issuer, {
    adapter: Memory,
    jwks: { keys },
    cookies: { keys: [crypto.randomBytes(16).toString('hex')] },
    claims: {
      openid: ['sub', 'email', 'email_verified', 'groups', 'name', 'preferred_username', 'roles', 'realm_access'],
    },
    // Claims are in the ID token itself, as Kubernetes wants them.
    conformIdTokenClaims: false,
    enabledJWA: { idTokenSigningAlgValues: algorithms },
    features: { devInteractions: { enabled: false } },
    ttl: {
      AccessToken: 3600,
      AuthorizationCode: 60,
      Grant: 3600,
      IdToken: (ctx) => accounts.get(ctx.oidc.entities.Account.accountId).lifetime,
      Interaction: 60,
      Session: 3600,
    },
    findAccount: (_, id) => accounts.has(id)
      && { accountId: id, claims: async () => ({ sub: id, ...accounts.get(id).claims }) },
    interactions: { url: (_, interaction) => `/log-in/${interaction.uid}` },
    // Nobody is asked whether a client may have what it wants.
    loadExistingGrant: async (ctx) => {
      const grant = new ctx.oidc.provider.Grant({
        clientId: ctx.oidc.client.clientId, accountId: ctx.oidc.session.accountId,
      });
      grant.addOIDCScope('openid');
      await grant.save();
      return grant;
    },
  });
  const callback = provider.callback();
  return async (request, response) => {
    if (!request.url.startsWith('/log-in/')) return callback(request, response);
    const { params } = await provider.interactionDetails(request, response);
    return provider.interactionFinished(request, response, { login: { accountId: params.login_hint } });
  };
}

let handler = newHandler();
const server = https.createServer(
  { key: fs.readFileSync(keyFile), cert: fs.readFileSync(certificateFile) },
  (request, response) => handler(request, response),
);

function listen() {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(Number(port), '127.0.0.1', resolve);
  });
}

async function execute(command) {
  if (command.account) {
    accounts.set(command.account, { claims: command.claims, lifetime: command.lifetime });
  } else if (command.client) {
    clients.set(command.client, {
      client_id: command.client,
      token_endpoint_auth_method: 'none',
      redirect_uris: ['https://client.test/callback'],
      id_token_signed_response_alg: command.algorithm,
    });
  } else if (command.rotate) {
    keys = [...newKeys(), ...(command.keep ? keys : [])];
    handler = newHandler();
  } else if (command.listen === false) {
    await new Promise((resolve) => {
      server.close(resolve);
      server.closeAllConnections();
    });
  } else if (command.listen) {
    await listen();
  } else {
    throw new Error(`unknown command ${JSON.stringify(command)}`);
  }
}

await listen();
console.log(JSON.stringify({ issuer }));
for await (const line of readline.createInterface({ input: process.stdin })) {
  await execute(JSON.parse(line));
  console.log('{}');
}
process.exit(0);
